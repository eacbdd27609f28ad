"""Search spaces, one a file: `space()` maps dotted config paths to lists of values, `metric` and `mode` rank the trials."""

"""The jobs on Ray. The only folder that imports Ray: each module takes a config, and does its work through Ray-free code."""

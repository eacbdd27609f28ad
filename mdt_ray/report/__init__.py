"""What people are shown of runs: HTML pages, and the pictures in them. No Ray, and nothing is measured here."""

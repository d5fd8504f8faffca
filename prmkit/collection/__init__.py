"""Ask strong judges about the steps of runs: requests, answers, rows."""

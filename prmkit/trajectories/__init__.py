"""Import agent runs: any common format in, one trajectory record out, with human labels."""

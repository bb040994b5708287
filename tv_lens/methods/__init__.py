"""How vectors are made: a file for each kind."""

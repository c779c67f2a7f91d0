"""`headsink bench all`: records of measurements and the results page made from them."""

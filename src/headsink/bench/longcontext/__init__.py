"""`headsink bench quality --suite`: long-context suites, scored by the lm-evaluation-harness."""

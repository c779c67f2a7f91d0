"""Reports: a census, a comparison and a quality frontier as HTML pages that need no network, and their charts as pictures."""

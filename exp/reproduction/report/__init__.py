"""Results of many runs -> Markdown, LaTeX, CSV, a page of HTML and README's section."""

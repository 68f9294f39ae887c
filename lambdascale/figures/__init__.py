"""One module per paper figure: required rows in, a tidy frame, axes out. The only users of matplotlib and seaborn."""

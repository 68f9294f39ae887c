"""One module per figure: from the table of a study to a tidy frame, and from that to axes. No other code uses matplotlib."""

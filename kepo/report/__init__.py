"""One HTML file about one run or several: curves, accuracy, memory, data and completions."""

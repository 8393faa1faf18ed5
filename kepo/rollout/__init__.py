"""The path from questions to scored completions: sampling, exchange of questions, hints."""

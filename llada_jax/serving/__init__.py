"""Answers for people and programs: one model and one queue behind the terminal, the web page and the API."""

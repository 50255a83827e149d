"""The general list of prompts that ships: how its 4,000 captions are made from words."""

"""Words of messages: numbers of things, and what a misspelt name may have meant."""

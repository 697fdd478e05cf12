"""A terminal app that corrects text, to start one's own from: `app` ties together what the others do."""

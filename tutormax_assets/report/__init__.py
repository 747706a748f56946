"""The daily report: what it says, and the page that says it."""

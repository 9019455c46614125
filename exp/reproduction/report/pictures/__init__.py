"""Pictures and plots of the page."""

"""A page that shows a run while it goes on: `fedcore server --dashboard PORT`."""
from fedcore.dashboard.server import Dashboard, serve_dashboard

__all__ = ["Dashboard", "serve_dashboard"]

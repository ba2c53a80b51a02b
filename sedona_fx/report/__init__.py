"""What people look at: text and pictures."""

from sedona_fx.report.picture import plan_picture
from sedona_fx.report.text import human, net_report, table

__all__ = ["human", "net_report", "plan_picture", "table"]

"""Reports for people: tables as text, and pictures."""

from sedona_fx.report.picture import front_picture, plan_picture
from sedona_fx.report.text import human, net_report, table

__all__ = ["front_picture", "human", "net_report", "plan_picture", "table"]

"""Reports for people: tables as text, and pictures.

Files

colors      The colours of all pictures. Blues and orange can be told apart with every kind of colour vision
front       The picture of a front: validation loss against cost, every tried plan as a dot and the front as a step
            line
picture     Pictures as PNG files: how a plan was found, and validation loss against cost for many plans
rounds      The picture of a rollout: the losses of its plans until they were dropped, and the net as it is cut
scores      The picture of the guided search: scores by gradients of all cuts and heads, the best plans, and their
            rollouts
text        Reports as text: numbers with units, tables, and what ``print(net)`` shows
trajectory  The picture of SEDONA's search: p_isolate and the heads' weights of the base layers, at the end and over
            time
"""

from sedona_fx.report.picture import front_picture, plan_picture
from sedona_fx.report.text import human, net_report, table

__all__ = ["front_picture", "human", "net_report", "plan_picture", "table"]

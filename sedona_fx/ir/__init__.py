"""The graph dialect: what a node knows about itself, the specification of each phase, data flow, and costs."""

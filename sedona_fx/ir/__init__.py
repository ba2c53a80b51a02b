"""The graph dialect: what is recorded about a node, the specification of each phase, data flow, and costs."""

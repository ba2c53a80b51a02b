"""Plans from elsewhere: another net's, the authors' released ones, and the front of loss against cost."""

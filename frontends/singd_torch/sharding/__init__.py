"""Models in parts on several processes: which of them can be trained, and how."""

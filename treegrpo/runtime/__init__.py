"""How a process starts, reports why it ends, and looks after its children."""

"""Looking at attacks and at the models they leave: pictures and figures, drawn from runs and specs."""

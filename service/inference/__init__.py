"""From a decoded call to its answer: slots, deadlines, images, the run of a task."""

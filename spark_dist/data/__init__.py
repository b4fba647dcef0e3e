"""From a slice store to batches on the training device, and the storage of cached teacher targets."""

"""Settings of attention compared on whole videos: made, measured against the dense ones, and told with intervals."""

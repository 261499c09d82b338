"""Programs around the models: benchmarks, the doctor, measurements."""

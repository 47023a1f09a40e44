"""The parts of ``benchmarks/gpu.sh``: tests, sanitizer, ceilings, kernels, trainings, profiles."""

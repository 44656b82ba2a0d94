"""Images, labels, splits and views. `build.build_data` puts them together for a run."""

"""What every program has: configuration, command line, run folder, report. Shared by all apps; not an app itself."""

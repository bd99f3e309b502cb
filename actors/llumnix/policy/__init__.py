"""What the scheduler decides, as pure functions over frozen loads: virtual usage, dispatch, pairing, victims. No Ray."""

"""The servers: `port` says what each must offer, `peer` what the peers share, then one file or class each."""

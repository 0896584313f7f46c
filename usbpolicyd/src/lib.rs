//! Decides by policy which USB device goes to which virtual machine. See `ARCHITECTURE.md`.

//! The operator's tool. All of it is in [`usbpolicyd::ctl`].

use std::process::ExitCode;

fn main() -> ExitCode {
    usbpolicyd::ctl::main()
}

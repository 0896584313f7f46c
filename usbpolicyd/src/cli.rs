//! The command line of usbpolicyd.

use std::path::PathBuf;

use clap::Parser;

/// Gives USB devices to virtual machines, by policy.
///
/// Watches what is plugged in, decides by the policy which device goes to which VM, and hands the open device to that
/// VM's usbvfiod. Everything that no rule names stays with the host. Ask it with usbpolicyctl.
///
/// SIGHUP loads the policy again; a bad one is reported and the old one stays in force. SIGTERM ends the daemon: the VMs
/// keep their devices, and what they gave up is given back to the host's drivers first (8 s at most).
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    /// The policy: this one file, instead of /etc/usbpolicyd/policy.toml and the policy.d directories
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,

    /// Where each usbvfiod has its directory: DIR/VM/policy.sock
    #[arg(long, value_name = "DIR", default_value = "/run/usbvfiod")]
    pub run_dir: PathBuf,

    /// Where this daemon keeps its record of handed over devices
    #[arg(long, value_name = "DIR", default_value = "/run/usbpolicyd")]
    pub state_dir: PathBuf,

    /// Where operators' lasting orders are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/usbpolicyd")]
    pub order_dir: PathBuf,

    /// Socket for usbpolicyctl; everybody may connect, groups decide what they may do
    #[arg(long, value_name = "PATH", default_value = "/run/usbpolicyd/admin.sock")]
    pub admin_socket: PathBuf,

    /// Socket that tells everybody in the groups of usbpolicyctl what happens, and takes no request
    #[arg(long, value_name = "PATH", default_value = "/run/usbpolicyd/events.sock")]
    pub events_socket: PathBuf,

    /// End with status 2 when the policy is bad, instead of starting with everything left as it is
    #[arg(long)]
    pub strict: bool,

    /// DEBUGGING ONLY: keep all rights of the user that starts the daemon
    #[arg(long)]
    pub no_sandbox: bool,

    /// What to log: error, warn, info, debug, trace, or module=level,…
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_units() {
        let cli = Cli::try_parse_from(["usbpolicyd"]).unwrap();
        assert_eq!(cli.run_dir, PathBuf::from("/run/usbvfiod"));
        assert_eq!(cli.admin_socket, PathBuf::from("/run/usbpolicyd/admin.sock"));
        assert!(!cli.strict && cli.policy.is_none());
    }
}

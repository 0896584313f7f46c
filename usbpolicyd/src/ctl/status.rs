//! `usbpolicyctl status`: how the daemon itself is.

use std::io::Write;

use serde::Serialize;

use super::online::Socket;
use super::text::{WIDTH, escaped, wrapped};
use super::{Outcome, finish};
use crate::admin::wire::{Reply, Request, StatusView};

/// Show the daemon's own state: its mode, its policy, the ports it keeps
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    socket: Socket,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    #[serde(flatten)]
    status: &'a StatusView,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let (replies, result) = args.socket.call(&Request::Status)?;
    for reply in replies {
        let Reply::Status(view) = reply else { continue };
        if args.json {
            serde_json::to_writer_pretty(
                &mut *out,
                &Report { schema: "usbpolicyctl-status/1", status: &view },
            )?;
            writeln!(out)?;
        } else {
            out.write_all(human(&view).as_bytes())?;
        }
    }
    finish(result, out)
}

fn human(view: &StatusView) -> String {
    let mode = match view.mode.as_str() {
        "normal" => "normal".to_owned(),
        mode => format!("{mode}, by usbpolicyd.mode= on the kernel's command line: nothing is handed over"),
    };
    let policy = if view.policy {
        view.files.join(", ")
    } else {
        "none that can be used; see `usbpolicyctl check`".to_owned()
    };
    let ports = if view.claimed_ports.is_empty() { "none".to_owned() } else { view.claimed_ports.join(", ") };
    let lines = [
        ("version", view.program.clone()),
        ("mode", mode),
        ("now", view.status.clone()),
        ("policy", policy),
        ("ports kept", ports),
    ];
    let mut text = String::new();
    for (key, value) in lines {
        for (index, line) in wrapped(&escaped(&value), WIDTH - 12).iter().enumerate() {
            text += &format!("{:<10}  {line}\n", if index == 0 { key } else { "" });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> StatusView {
        StatusView {
            program: "0.1.0".to_owned(),
            mode: "normal".to_owned(),
            policy: true,
            files: vec!["/etc/usbpolicyd/policy.toml".to_owned()],
            last_seq: 7,
            status: "5 devices, 1 with VMs, 1 VMs up, 0 conflicts".to_owned(),
            claimed_ports: (1..=9).map(|port| format!("usb1-port{port}")).collect(),
        }
    }

    #[test]
    fn state_is_told_in_80_columns() {
        let text = human(&view());
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert_eq!(
            text,
            "version     0.1.0\n\
             mode        normal\n\
             now         5 devices, 1 with VMs, 1 VMs up, 0 conflicts\n\
             policy      /etc/usbpolicyd/policy.toml\n\
             ports kept  usb1-port1, usb1-port2, usb1-port3, usb1-port4, usb1-port5,\n\
             \u{20}           usb1-port6, usb1-port7, usb1-port8, usb1-port9\n"
        );
    }

    #[test]
    fn what_keeps_the_daemon_still_is_told() {
        let still = StatusView { mode: "off".to_owned(), policy: false, claimed_ports: vec![], ..view() };
        let text = human(&still);
        assert!(text.contains("off, by usbpolicyd.mode= on the kernel's command line"), "{text}");
        assert!(text.contains("none that can be used; see `usbpolicyctl check`"), "{text}");
    }

    #[test]
    fn json_names_its_form() {
        let report = Report { schema: "usbpolicyctl-status/1", status: &view() };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], "usbpolicyctl-status/1");
        assert_eq!(json["mode"], "normal");
    }
}

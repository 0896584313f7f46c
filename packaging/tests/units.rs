//! The systemd units are valid, confine as much as we promise, and call the programs as these want to be called.
//!
//! What they do on a running system is shown in `vm-tests`; here systemd's own tools read them. A missing tool fails the
//! test: `make setup` installs it.

#![expect(clippy::unwrap_used, reason = "a test says by its panic what went wrong")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clap::Parser;

/// Highest exposure levels, as `systemd-analyze security` counts them (0 to 10), in tenths.
const USBPOLICYD_EXPOSURE: u32 = 12;
const USBVFIOD_EXPOSURE: u32 = 4;
const SYSFS_EXPOSURE: u32 = 7;
const WAIT_EXPOSURE: u32 = 4;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd")
}

fn unit(name: &str) -> String {
    fs::read_to_string(directory().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The names of all units.
fn names() -> Vec<String> {
    let entries = fs::read_dir(directory()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The values of a key in a unit, in order.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; `make setup` installs it"))
}

/// Exposure in tenths, from a line like `→ Overall exposure level for usbpolicyd.service: 1.2 OK`.
fn exposure(name: &str) -> u32 {
    let path = directory().join(name);
    let output = run("systemd-analyze", &["security", "--offline=yes", "--no-pager", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.contains("Overall exposure level"))
        .unwrap_or_else(|| panic!("no result: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let number = line.rsplit(": ").next().unwrap().split_whitespace().next().unwrap();
    let (whole, tenths) = number.split_once('.').unwrap();
    println!("{line}");
    whole.parse::<u32>().unwrap() * 10 + tenths.parse::<u32>().unwrap()
}

#[test]
fn usbpolicyd_is_confined_as_promised() {
    assert!(exposure("usbpolicyd.service") <= USBPOLICYD_EXPOSURE);
}

#[test]
fn usbvfiod_is_confined_as_promised() {
    assert!(exposure("usbvfiod@.service") <= USBVFIOD_EXPOSURE);
}

#[test]
fn the_service_that_writes_to_sysfs_is_confined_as_promised() {
    assert!(exposure("usbpolicyd-sysfs.service") <= SYSFS_EXPOSURE);
    let text = unit("usbpolicyd-sysfs.service");
    assert_eq!(values(&text, "CapabilityBoundingSet"), [""]);
    assert_eq!(values(&text, "ReadWritePaths"), ["/sys/devices"]);
}

#[test]
fn the_service_that_waits_for_required_devices_is_confined_and_may_only_look() {
    use usbpolicyd::admin::Role;
    assert!(exposure("usbpolicyd-wait@.service") <= WAIT_EXPOSURE);
    let text = unit("usbpolicyd-wait@.service");
    assert_eq!(values(&text, "Group"), [Role::View.group()]);
    let [command] = values(&text, "ExecStart")[..] else { panic!("one ExecStart expected") };
    let command = command.replace("%i", "vm1").replace("${USBPOLICYD_WAIT_SECONDS}", "90");
    usbpolicyd::ctl::Cli::try_parse_from(command.split_whitespace()).unwrap();
    assert_eq!(values(&text, "Environment"), ["USBPOLICYD_WAIT_SECONDS=90"]);
}

#[test]
fn the_sockets_of_usbpolicyd_are_where_its_clients_look_and_outlive_it() {
    let service = unit("usbpolicyd.service");
    assert_eq!(values(&service, "Sockets"), ["usbpolicyd.socket usbpolicyd-events.socket"]);
    let [command] = values(&service, "ExecStart")[..] else { panic!("one ExecStart expected") };
    let cli = usbpolicyd::cli::Cli::try_parse_from(command.split_whitespace()).unwrap();
    for (name, path, called) in [
        ("usbpolicyd.socket", &cli.admin_socket, "admin"),
        ("usbpolicyd-events.socket", &cli.events_socket, "events"),
    ] {
        let text = unit(name);
        assert_eq!(values(&text, "ListenSequentialPacket"), [path.to_str().unwrap()], "{name}");
        assert_eq!(values(&text, "FileDescriptorName"), [called], "{name}");
        assert_eq!(values(&text, "RemoveOnStop"), ["no"], "{name}");
        // Who may do what is decided by group, see `usbpolicyd::admin`.
        assert_eq!(values(&text, "SocketMode"), ["0666"], "{name}");
    }
    assert_eq!(values(&unit("usbpolicyd-events.socket"), "Service"), ["usbpolicyd.service"]);
}

#[test]
fn nobody_else_may_write_to_sysfs() {
    for name in names().into_iter().filter(|name| name.ends_with(".service")) {
        let text = unit(&name);
        assert_eq!(values(&text, "ProtectKernelTunables"), ["yes"], "{name}");
        if name != "usbpolicyd-sysfs.service" {
            assert!(!values(&text, "ReadWritePaths").iter().any(|path| path.starts_with("/sys")), "{name}");
        }
    }
}

#[test]
fn the_service_that_writes_to_sysfs_listens_where_usbpolicyd_asks_and_to_it_alone() {
    use usbpolicyd::sysfs_write::{SOCKET, service};
    let socket = unit("usbpolicyd-sysfs.socket");
    assert_eq!(values(&socket, "ListenSequentialPacket"), [SOCKET]);
    assert_eq!(values(&socket, "SocketMode"), ["0600"]);
    let text = unit("usbpolicyd-sysfs.service");
    assert_eq!(values(&text, "StandardInput"), ["socket"]);
    let [command] = values(&text, "ExecStart")[..] else { panic!("one ExecStart expected") };
    let cli = service::Cli::try_parse_from(command.split_whitespace()).unwrap();
    assert_eq!(values(&socket, "SocketUser"), [cli.user.as_str()]);
    assert_eq!(values(&unit("usbpolicyd.service"), "User"), [cli.user.as_str()]);
}

#[test]
fn systemd_finds_no_fault_in_any_unit() {
    // The programs need not be installed here, so a program that is there takes their place. An instance is checked, as
    // a template would not be filled in.
    let copies = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for name in names() {
        let text = unit(&name).replace("/usr/bin/usb", "/bin/true usb");
        fs::write(copies.path().join(&name), text).unwrap();
        paths.push(copies.path().join(name.replace('@', "@vm1")).to_str().unwrap().to_owned());
    }
    assert_eq!(paths.len(), 8);
    let mut arguments = vec!["verify", "--man=no", "--recursive-errors=no"];
    arguments.extend(paths.iter().map(String::as_str));
    let output = run("systemd-analyze", &arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    let faults: Vec<&str> =
        said.lines().filter(|line| line.contains(copies.path().to_str().unwrap())).collect();
    assert!(output.status.success() && faults.is_empty(), "{said}");
}

#[test]
fn usbvfiod_takes_the_arguments_of_its_unit() {
    let text = unit("usbvfiod@.service");
    let [command] = values(&text, "ExecStart")[..] else { panic!("one ExecStart expected") };
    let command = command.replace("%i", "vm1").replace("$USBVFIOD_OPTIONS", "--ports 4");
    let cli = usbvfiod::cli::Cli::try_parse_from(command.split_whitespace()).unwrap();
    // systemd's first socket (sd_listen_fds(3)), and a place that the mount namespace leaves writable.
    assert_eq!(cli.fd, Some(3));
    assert_eq!(cli.policy_socket, Some(PathBuf::from("/run/usbvfiod/vm1/policy.sock")));
    assert_eq!(values(&text, "BindPaths"), ["/run/usbvfiod/%i"]);
    assert_eq!(values(&text, "RuntimeDirectory"), ["usbvfiod/%i"]);
    assert!(!cli.no_sandbox);
}

#[test]
fn each_instance_has_a_user_of_its_own() {
    // Without User=, systemd takes the part before the "@" for all instances.
    let text = unit("usbvfiod@.service");
    assert_eq!(values(&text, "DynamicUser"), ["yes"]);
    assert_eq!(values(&text, "User"), ["usbvfiod-%i"]);
}

#[test]
fn a_restart_of_the_policy_daemon_stops_no_vm() {
    for name in ["usbvfiod@.service", "usbvfiod@.socket"] {
        let text = unit(name);
        for key in ["Requires", "Requisite", "BindsTo", "PartOf"] {
            let strong = values(&text, key);
            assert!(!strong.iter().any(|value| value.contains("usbpolicyd")), "{name}: {key}={strong:?}");
        }
    }
}

#[test]
fn the_users_and_groups_of_the_units_are_made_by_sysusers() {
    let sysusers = fs::read_to_string(directory().join("../sysusers.d/usbpolicyd.conf")).unwrap();
    let made: Vec<&str> = sysusers
        .lines()
        .filter(|line| line.starts_with(['u', 'g']))
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    let mut asked = Vec::new();
    for name in names() {
        let text = unit(&name);
        for key in ["User", "Group", "SupplementaryGroups", "SocketUser", "SocketGroup"] {
            asked.extend(
                values(&text, key).iter().flat_map(|value| value.split_whitespace()).map(str::to_owned),
            );
        }
    }
    asked.retain(|name| name != "root" && !name.contains("%i"));
    assert!(asked.len() >= 4);
    for name in asked {
        assert!(made.contains(&name.as_str()), "{name} is made by nobody");
    }
}

#[test]
fn sysusers_takes_its_file() {
    let root = tempfile::tempdir().unwrap();
    let file = directory().join("../sysusers.d/usbpolicyd.conf");
    let root_option = format!("--root={}", root.path().display());
    let output = run("systemd-sysusers", &[&root_option, "--dry-run", file.to_str().unwrap()]);
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("usbpolicyd"), "{said}");
}

#[test]
fn groups_that_usbpolicyd_asks_for_are_made_by_sysusers() {
    use usbpolicyd::admin::Role;
    let sysusers = fs::read_to_string(directory().join("../sysusers.d/usbpolicyd.conf")).unwrap();
    for role in [Role::View, Role::Operate, Role::Admin] {
        let group = role.group();
        assert!(sysusers.lines().any(|line| line.starts_with(&format!("g {group} "))), "{group}");
    }
}

#[test]
fn places_that_usbpolicyd_writes_to_are_left_writable_by_its_unit() {
    let text = unit("usbpolicyd.service");
    let [command] = values(&text, "ExecStart")[..] else { panic!("one ExecStart expected") };
    let cli = usbpolicyd::cli::Cli::try_parse_from(command.split_whitespace()).unwrap();
    assert!(!cli.no_sandbox);
    assert_eq!(values(&text, "ReadWritePaths"), ["/run/usbpolicyd"]);
    assert_eq!(cli.state_dir, PathBuf::from("/run/usbpolicyd"));
    assert!(cli.admin_socket.starts_with("/run/usbpolicyd"));
    assert_eq!(values(&text, "StateDirectory"), ["usbpolicyd"]);
    assert_eq!(cli.order_dir, PathBuf::from("/var/lib/usbpolicyd"));
    let tmpfiles = fs::read_to_string(directory().join("../tmpfiles.d/usbpolicyd.conf")).unwrap();
    let made = |line: &str| {
        line.split_whitespace().eq(["d", "/run/usbpolicyd", "0755", "usbpolicyd", "usbpolicyd", "-"])
    };
    assert!(tmpfiles.lines().any(made), "{tmpfiles}");
}

//! `usbpolicyctl list`: the devices, what the policy says of them and where they are.

use std::io::Write;

use common::ids::VmName;
use serde::Serialize;

use super::online::Socket;
use super::text::{WIDTH, escaped};
use super::{Outcome, host, refused, text};
use crate::admin::wire::{DeviceView, Reply, Request, State};
use crate::daemon::answer::device_view;
use crate::facts::DeviceFacts;
use crate::policy::decide::{Context, Verdict, decide};
use crate::policy_files::Places;

/// List the devices: who has each one, or why nobody does
///
/// Exit status: 0 listed, 1 a device is in trouble (conflict, failed, stuck), 2 the daemon cannot be asked.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    socket: Socket,
    /// Do not ask the daemon: show what the installed policy says of what sysfs shows
    #[arg(long)]
    no_daemon: bool,
    /// Only devices of this VM, or meant for it
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Hubs too
    #[arg(long)]
    hubs: bool,
    /// More of each device: socket, serial number, drivers, rule
    #[arg(long, short)]
    long: bool,
    /// As they are plugged into each other; hubs too
    #[arg(long, conflicts_with = "json")]
    tree: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    devices: &'a [DeviceView],
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let views: Vec<DeviceView> = if args.no_daemon {
        without_daemon()?
    } else {
        let (replies, result) = args.socket.call(&Request::List)?;
        if let Err(text) = result {
            return Ok(refused(&text));
        }
        let views = replies.into_iter().filter_map(|reply| match reply {
            Reply::Device(view) => Some(*view),
            _ => None,
        });
        views.collect()
    };
    let mut views: Vec<DeviceView> = views
        .into_iter()
        .filter(|view| args.hubs || args.tree || args.json || !view.hub)
        .filter(|view| args.vm.as_ref().is_none_or(|vm| is_of(view, vm)))
        .collect();
    views.sort_by_cached_key(|view| sort_key(&view.name));
    print(&views, args.json, args.tree, args.long, out)?;
    let trouble = views.iter().any(is_trouble);
    Ok(if trouble { Outcome::Found } else { Outcome::Done })
}

/// What sysfs shows and the installed policy says; who has what is not known.
fn without_daemon() -> anyhow::Result<Vec<DeviceView>> {
    let snapshot = host::this_host()?;
    let policy = host::compiled(&Places::default().read()?, &snapshot.topology)?;
    let view = |facts: &DeviceFacts| {
        let verdict = decide(&policy, facts, &Context::default());
        device_view(facts, &policy, verdict, State::Unknown)
    };
    Ok(snapshot.devices.iter().map(view).collect())
}

fn print(
    views: &[DeviceView],
    json: bool,
    tree: bool,
    long: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, &Report { schema: "usbpolicyctl-list/1", devices: views })?;
        writeln!(out)?;
        return Ok(());
    }
    if views.is_empty() {
        writeln!(out, "no devices")?;
        return Ok(());
    }
    let indent = |view: &DeviceView| if tree { 2 * view.name.matches('.').count() } else { 0 };
    let names = views.iter().map(|view| indent(view) + view.name.chars().count()).max().unwrap_or(0).max(6);
    let colour = text::colour();
    let mut bus = "";
    for view in views {
        let at_bus = view.name.split('-').next().unwrap_or_default();
        if tree && at_bus != bus {
            bus = at_bus;
            let controller = view.halves.first().and_then(|half| half.split('/').next()).unwrap_or_default();
            writeln!(out, "bus {bus}  {}", escaped(controller))?;
        }
        let name = format!("{}{}", " ".repeat(indent(view)), view.name);
        let state = state_text(view);
        // Two columns of nine and the gaps; the rest is for what it is and how it stands, half each.
        let room = WIDTH.saturating_sub(names + 9 + 6);
        let what_room = room * 2 / 5;
        let what = cut(&what(view), what_room);
        let (on, off) = colours(view, colour);
        let lines = text::wrapped(&state, room.saturating_sub(what_room));
        let first = lines.first().map_or("", String::as_str);
        writeln!(out, "{name:names$}  {}  {what:what_room$}  {on}{first}{off}", view.ids)?;
        let pad = " ".repeat(names + 9 + 6 + what_room);
        for line in lines.iter().skip(1) {
            writeln!(out, "{pad}{on}{line}{off}")?;
        }
        if long {
            details(view, names + 2, out)?;
        }
    }
    Ok(())
}

/// Everything else about one device, below its line.
fn details(view: &DeviceView, indent: usize, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut line = |key: &str, value: String| {
        if value.is_empty() { Ok(()) } else { writeln!(out, "{:indent$}{key:8} {value}", "") }
    };
    let named =
        view.connector_name.as_deref().map(|name| format!("{} = ", escaped(name))).unwrap_or_default();
    let halves: Vec<String> = view.halves.iter().map(|half| escaped(half)).collect();
    line("socket", format!("{named}{}", halves.join(" = ")))?;
    line("serial", view.serial.as_deref().map(escaped).unwrap_or_default())?;
    line("speed", view.speed.to_string())?;
    line("classes", view.classes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))?;
    line("drivers", escaped(&view.drivers.join(" ")))?;
    let uses: Vec<String> = view.host_use.iter().map(|one| escaped(&one.why)).collect();
    line("in use", uses.join("; "))?;
    if let Verdict::Assign { rule, .. } | Verdict::Denied { rule, .. } | Verdict::Unexpected { rule, .. } =
        &view.decision
    {
        line("rule", escaped(rule))?;
    }
    line("order", view.order.as_deref().map(escaped).unwrap_or_default())?;
    Ok(())
}

/// What the device says it is.
fn what(view: &DeviceView) -> String {
    let parts = [&view.manufacturer, &view.product];
    let words: Vec<String> = parts.into_iter().flatten().map(|part| escaped(part.trim())).collect();
    let mut words = words.join(" ");
    if words.is_empty() {
        words = view.classes.first().map_or_else(|| "?".to_owned(), |class| format!("class {class}"));
    }
    words
}

/// Where it is, or why nobody has it.
pub(super) fn state_text(view: &DeviceView) -> String {
    let seconds = |millis: u64| millis.div_ceil(1000);
    match &view.state {
        State::Attached { vm, guest_port: 0 } => format!("with {vm}"),
        State::Attached { vm, guest_port } => format!("with {vm}, guest port {guest_port}"),
        State::Attaching { vm } => format!("going to {vm}"),
        State::Detaching { vm } => format!("leaving {vm}"),
        State::Stuck { vm } => format!("STUCK: usbvfiod of {vm} does not let go"),
        State::Releasing => "going back to the host".to_owned(),
        State::VmDown { vm } => format!("for {vm}, which does not run"),
        State::VmPaused { vm } => format!("for {vm}, which is paused"),
        State::VmFull { vm } => format!("for {vm}, which has all it may have"),
        State::Failed { vm, text, retry_in_ms } => {
            format!("FAILED for {vm}: {}; again in {} s", escaped(text), seconds(*retry_in_ms))
        }
        State::NotReleased { text, retry_in_ms } => {
            format!("NOT GIVEN BACK: {}; again in {} s", escaped(text), seconds(*retry_in_ms))
        }
        State::Flapping { calm_in_ms } => {
            format!("plugged too often; left alone for {} s", seconds(*calm_in_ms))
        }
        State::Idle { mode } => {
            format!("{}; stays here by usbpolicyd.mode={mode}", decision_text(&view.decision))
        }
        State::Starting => "usbpolicyd is starting".to_owned(),
        State::OnHold => format!("on hold; {}", decision_text(&view.decision)),
        State::Deauthorized => format!("deauthorized; {}", decision_text(&view.decision)),
        State::Host | State::Unknown => decision_text(&view.decision),
    }
}

fn decision_text(verdict: &Verdict) -> String {
    let names = |vms: &[VmName]| vms.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match verdict {
        Verdict::Host => "host: no rule names it".to_owned(),
        Verdict::Protected { why } => format!("host, protected: {}", escaped(why)),
        Verdict::Busy { why } => format!("host, in use: {}", escaped(why)),
        Verdict::Denied { rule, reason } => match reason {
            Some(reason) => format!("denied by {}: {}", escaped(rule), escaped(reason)),
            None => format!("denied by {}", escaped(rule)),
        },
        Verdict::Assign { vm, rule, .. } => format!("for {vm} by {}", escaped(rule)),
        Verdict::Unexpected { vm, rule, why } => {
            format!("UNEXPECTED for {vm}: {} ({})", escaped(why), escaped(rule))
        }
        Verdict::Conflict { vms, rules } => {
            format!("CONFLICT of {} ({})", names(vms), escaped(&rules.join(", ")))
        }
        Verdict::Manual { vms, .. } => format!("host; may be attached to {}", names(vms)),
        Verdict::Kept { actor } => format!("kept on the host by {}", escaped(actor)),
    }
}

/// The VM that has a device or should have it.
fn is_of(view: &DeviceView, name: &str) -> bool {
    let is_it = |vm: &VmName| vm.as_str() == name;
    let by_state = match &view.state {
        State::Attached { vm, .. }
        | State::Attaching { vm }
        | State::Detaching { vm }
        | State::Stuck { vm }
        | State::VmDown { vm }
        | State::VmPaused { vm }
        | State::VmFull { vm }
        | State::Failed { vm, .. } => is_it(vm),
        _ => false,
    };
    let by_decision = match &view.decision {
        Verdict::Assign { vm, .. } | Verdict::Unexpected { vm, .. } => is_it(vm),
        Verdict::Conflict { vms, .. } | Verdict::Manual { vms, .. } => vms.iter().any(is_it),
        _ => false,
    };
    by_state || by_decision
}

fn is_trouble(view: &DeviceView) -> bool {
    matches!(view.state, State::Failed { .. } | State::NotReleased { .. } | State::Stuck { .. })
        || matches!(view.decision, Verdict::Conflict { .. } | Verdict::Unexpected { .. })
}

fn colours(view: &DeviceView, colour: bool) -> (&'static str, &'static str) {
    match &view.state {
        _ if !colour => ("", ""),
        _ if is_trouble(view) => ("\x1b[31m", "\x1b[0m"),
        State::Attached { .. } => ("\x1b[32m", "\x1b[0m"),
        _ => ("", ""),
    }
}

/// Cuts at a column, with a mark.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// `1-4.10` after `1-4.9`.
fn sort_key(name: &str) -> Vec<u32> {
    name.split(['-', '.']).map(|part| part.parse().unwrap_or(u32::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::tests::stick;
    use crate::policy::compile::CompiledPolicy;

    fn view(chain: &str, state: State) -> DeviceView {
        device_view(&stick(chain), &CompiledPolicy::default(), Verdict::Host, state)
    }

    fn printed(views: &[DeviceView], tree: bool, long: bool) -> String {
        let mut out = Vec::new();
        print(views, false, tree, long, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn list_fits_80_columns_and_wraps_long_states() {
        let work = "work".parse().unwrap();
        let text =
            "no right to open /dev/bus/usb/001/005 for reading and writing: install the rule".to_owned();
        let views = [
            view("9", State::Attached { vm: "work".parse().unwrap(), guest_port: 3 }),
            view("10.1", State::Failed { vm: work, text, retry_in_ms: 1500 }),
        ];
        let text = printed(&views, false, true);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.contains("with work, guest port 3") && text.contains("again in"), "{text}");
    }

    #[test]
    fn strings_of_devices_cannot_act_on_the_terminal() {
        let mut evil = view("9", State::Unknown);
        evil.product = Some("\u{1b}[2J\u{202e}x".into());
        evil.serial = Some("\u{9b}31m".into());
        let text = printed(&[evil], false, true);
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains('\u{202e}'), "{text}");
    }

    #[test]
    fn devices_sort_by_number() {
        let mut names = ["1-10", "1-9", "1-4.10", "1-4.9", "1-4"];
        names.sort_by_key(|name| sort_key(name));
        assert_eq!(names, ["1-4", "1-4.9", "1-4.10", "1-9", "1-10"]);
    }

    #[test]
    fn tree_indents_below_hubs() {
        let text = printed(&[view("9", State::Unknown), view("9.1", State::Unknown)], true, false);
        assert!(text.starts_with("bus 1  pci-0000:00:14.0\n1-9 "), "{text}");
        assert!(text.contains("\n  1-9.1"), "{text}");
    }
}

//! How long 120 devices take to decide with 1000 rules: `cargo bench -p usbpolicyd --bench decide`.
//!
//! Prints the median and the worst CPU time of a hundred rounds for policies of several shapes, and fails when a median is over
//! the budget of 5 ms.

#![expect(clippy::unwrap_used, reason = "the input is made here")]

use std::fmt::Write as _;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use usbpolicyd::facts::{DeviceFacts, Snapshot};
use usbpolicyd::policy::compile::{CompiledPolicy, compile};
use usbpolicyd::policy::decide::{Context, decide};
use usbpolicyd::policy::lint::lint;
use usbpolicyd::policy::load::load_one;

const RULES: usize = 1000;
const DEVICES: usize = 120;
const ROUNDS: usize = 100;
const BUDGET: Duration = Duration::from_millis(5);

/// One rule for each number; a policy is a thousand of them.
type Shape = (&'static str, fn(usize) -> String);

/// All are within the budget.
const SHAPES: [Shape; 7] = [
    ("mixed", |n| SHAPES[1 + n % 5].1(n)),
    ("by id and serial", |n| format!("match = {{ id = '{:04x}:{:04x}', serial = 'S{n}*' }}", n % 40, n % 7)),
    ("by port", |n| {
        format!("match.at = 'pci-0000:00:14.0/usb2:{}.{}.{}'", 1 + n % 8, 1 + n / 8 % 8, 1 + n / 64)
    }),
    ("by vendor", |n| format!("match.id = '{:04x}:*'", n % 40)),
    ("by subtree", |n| format!("match.at = 'hub{}'", n % 64)),
    ("by interfaces", |n| {
        format!(
            "match = {{ interfaces.any = ['{:02x}'], interfaces.none = ['hid', '{:02x}'] }}",
            n % 20,
            n % 11
        )
    }),
    ("by name", |n| format!("match.product = '*Stick*{n}*'")),
];

fn policy(rule: fn(usize) -> String) -> String {
    let mut text = String::from("schema = 1\n[vms.a]\n[vms.b]\n");
    for hub in 0..64 {
        let (root, port) = (1 + hub / 8, 1 + hub % 8);
        let _ = writeln!(
            text,
            "[connectors.hub{hub}]\nat = 'pci-0000:00:14.0/usb2:{root}.{port}'\nsubtree = true"
        );
    }
    for number in 0..RULES {
        let vm = if number % 2 == 0 { "a" } else { "b" };
        let _ = writeln!(text, "[[assign]]\nvm = '{vm}'\n{}\n", rule(number));
    }
    text
}

/// The devices of the recorded host, each many times in other places.
fn devices() -> Vec<DeviceFacts> {
    let recorded: Snapshot = serde_json::from_str(include_str!("../tests/data/office-host.json")).unwrap();
    let place = |number: usize| format!("{}.{}.{}", 1 + number % 8, 1 + number / 8 % 8, 1 + number / 64);
    let mut all: Vec<DeviceFacts> = recorded.devices.iter().filter(|one| !one.is_hub()).cloned().collect();
    all = all.into_iter().cycle().take(DEVICES).collect();
    for (number, device) in all.iter_mut().enumerate() {
        device.chain = place(number).parse().unwrap();
        device.sys_name = format!("1-{}", device.chain);
        let port = format!("pci-0000:00:14.0/usb2:{}", device.chain);
        device.connector.halves = [port.parse().unwrap()].into();
        device.id.vendor = u16::try_from(number % 40).unwrap();
        device.id.product = u16::try_from(number % 7).unwrap();
        device.serial = Some(format!("S{number}-0123456789ABCDEF"));
        device.product = Some(format!("Some Stick with a long name, number {number}"));
        device.host_use.clear();
    }
    all
}

/// Time this thread was running, so that a busy machine does not count.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

fn decide_all(policy: &CompiledPolicy, devices: &[DeviceFacts]) -> Duration {
    let context = Context::default();
    let start = cpu_time();
    for device in devices {
        black_box(decide(black_box(policy), black_box(device), &context));
    }
    cpu_time() - start
}

fn main() -> ExitCode {
    let devices = devices();
    let mut within = true;
    println!("{RULES} rules, {DEVICES} devices, {ROUNDS} rounds");
    println!("{:20} {:>10} {:>10} {:>12} {:>12}", "rules", "median", "worst", "load", "check");
    for (name, rule) in SHAPES {
        let text = policy(rule);
        let start = Instant::now();
        let loaded = load_one("policy.toml", &text).unwrap().policy;
        let policy = compile(&loaded, &usbpolicyd::topology::Topology::default());
        let load = start.elapsed();
        let start = Instant::now();
        black_box(lint(&loaded, None));
        let check = start.elapsed();
        let mut rounds: Vec<Duration> = (0..ROUNDS).map(|_| decide_all(&policy, &devices)).collect();
        rounds.sort();
        let (median, worst) = (rounds[ROUNDS / 2], rounds[ROUNDS - 1]);
        println!("{name:20} {median:>10.1?} {worst:>10.1?} {load:>12.1?} {check:>12.1?}");
        within &= median <= BUDGET;
    }
    if within {
        ExitCode::SUCCESS
    } else {
        println!("over the budget of {BUDGET:?}");
        ExitCode::FAILURE
    }
}

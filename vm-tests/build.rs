//! Tells the tests whether a Cloud Hypervisor is there, so that those which need it show as ignored when it is not.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CLOUD_HYPERVISOR");
    println!("cargo::rustc-check-cfg=cfg(cloud_hypervisor)");
    if std::env::var_os("CLOUD_HYPERVISOR").is_some() {
        println!("cargo::rustc-cfg=cloud_hypervisor");
    }
}

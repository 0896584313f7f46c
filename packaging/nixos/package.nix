# NOT RUN: there was no machine with Nix to try this on. It says what a package needs; expect to correct details.
{
  lib,
  rustPlatform,
  pkg-config,
  udev,
}:

rustPlatform.buildRustPackage {
  pname = "usbpolicyd";
  version = "0.1.0";
  src = lib.cleanSource ../..;
  cargoLock.lockFile = ../../Cargo.lock;

  nativeBuildInputs = [ pkg-config ];
  buildInputs = [ udev ];

  # The scenarios need QEMU and an image of a host, other tests need systemd's tools.
  cargoTestFlags = [
    "--package=common"
    "--package=usbpolicyd"
    "--package=usbvfiod"
  ];

  postInstall = ''
    $out/bin/packaging made
    rm $out/bin/packaging
    for page in made/man/*; do
      install -D -m 644 "$page" "$out/share/man/man''${page##*.}/$(basename "$page")"
    done
    for file in made/bash/*.bash; do
      install -D -m 644 "$file" "$out/share/bash-completion/completions/$(basename "$file" .bash)"
    done
    install -D -m 644 -t $out/share/zsh/site-functions made/zsh/*
    install -D -m 644 -t $out/share/fish/vendor_completions.d made/fish/*
    install -D -m 644 -t $out/lib/udev/rules.d packaging/udev/70-usbpolicyd.rules
    install -D -m 644 -t $out/share/vfio-user packaging/vfio-user/50-usbvfiod.json
    install -D -m 644 -t $out/lib/systemd/system packaging/systemd/*
    substituteInPlace $out/lib/systemd/system/*.service \
      --replace-fail /usr/bin/usb $out/bin/usb
    substituteInPlace $out/share/vfio-user/50-usbvfiod.json \
      --replace-fail /usr/bin/usb $out/bin/usb
  '';

  meta = {
    description = "USB devices for virtual machines, by policy";
    license = with lib.licenses; [ mit asl20 ];
    platforms = [ "x86_64-linux" "aarch64-linux" ];
    mainProgram = "usbpolicyctl";
  };
}

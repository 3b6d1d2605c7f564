//! `cargo xtask guest`: the ledger guest, a Debian cloud kernel and an initramfs with busybox, the guest
//! agent and the `ledger` program.
//!
//! Everything is made as an ordinary user: the Debian packages are downloaded and unpacked into
//! `.cache/guest`, never installed, so the host's own kernel and agent are left alone. The result is used
//! again until one of its inputs changes; the packages until `--refresh` is given.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{cargo, cpio::Archive};

/// What the guest needs from the kernel, in the order in which it is loaded; what these depend on comes
/// before them. ext4 is built into Debian's cloud kernel. `button` and `evdev` carry the power button.
const MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_console",
    "button",
    "evdev",
];

/// The static target, apart from the host's so that its flags do not rebuild everything else.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the guest if it is not up to date.
pub(crate) fn run(refresh: bool) -> Result<()> {
    let repository =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies outside the repository")?;
    let out = repository.join(".cache/guest");
    let sources = repository.join("crates/mainstay-ledger");
    let inputs = digest_inputs(&sources)?;
    let stamp = out.join("stamp");
    if !refresh && fs::read_to_string(&stamp).is_ok_and(|found| found == inputs) {
        return Ok(());
    }
    let root = fetch_packages(&out, refresh)?;
    let ledger = build_ledger(repository)?;
    let (kernel, version) = find_kernel(&root)?;
    let initrd = pack(&root, &sources.join("guest"), &ledger, &version)?;
    write_whole(&out.join("vmlinuz"), &fs::read(kernel)?)?;
    write_whole(&out.join("initrd.img"), &initrd)?;
    write_whole(&stamp, inputs.as_bytes())
}

/// A digest of everything of ours that goes into the guest.
fn digest_inputs(sources: &Path) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    (include_str!("guest.rs"), include_str!("cpio.rs")).hash(&mut hasher);
    for directory in ["src", "guest"] {
        for path in sorted_files(&sources.join(directory))? {
            (path.file_name(), fs::read(&path)?).hash(&mut hasher);
        }
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

/// Downloads and unpacks the packages; answers the directory they were unpacked into.
fn fetch_packages(out: &Path, refresh: bool) -> Result<PathBuf> {
    let root = out.join("root");
    if root.join("complete").exists() && !refresh {
        return Ok(root);
    }
    let packages = out.join("packages");
    for directory in [&root, &packages] {
        if directory.exists() {
            fs::remove_dir_all(directory)?;
        }
        fs::create_dir_all(directory)?;
    }
    let mut names = BTreeSet::from(["busybox-static".to_owned(), "qemu-guest-agent".to_owned()]);
    names.insert(kernel_package()?);
    names.extend(agent_libraries()?);
    let mut download = Command::new("apt-get");
    download.arg("download").args(&names).current_dir(&packages);
    output_of(&mut download)
        .context("downloading the guest's packages (run `apt-get update` if they are gone)")?;
    for package in sorted_files(&packages)? {
        output_of(Command::new("dpkg").arg("-x").arg(&package).arg(&root))?;
    }
    fs::remove_dir_all(&packages)?;
    fs::write(root.join("complete"), "")?;
    Ok(root)
}

/// The package behind Debian's name for its current cloud kernel.
fn kernel_package() -> Result<String> {
    let text = output_of(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(line.context("linux-image-cloud-amd64 is not among the apt sources")?.to_owned())
}

/// The library packages in the dependency closure of the guest agent.
fn agent_libraries() -> Result<Vec<String>> {
    let mut command = Command::new("apt-cache");
    command.args([
        "depends",
        "--recurse",
        "--no-recommends",
        "--no-suggests",
        "--no-conflicts",
        "--no-breaks",
    ]);
    command.args(["--no-replaces", "--no-enhances", "qemu-guest-agent"]);
    let text = output_of(&mut command)?;
    let is_library = |name: &&str| {
        (name.starts_with("lib") || *name == "zlib1g") && !name.contains("perl") && !name.contains(':')
    };
    let names: Vec<String> = text
        .lines()
        .filter(|line| !line.starts_with([' ', '<']))
        .filter(is_library)
        .map(str::to_owned)
        .collect();
    // Virtual packages have no version to download.
    let mut policy = Command::new("apt-cache");
    policy.arg("policy").args(&names);
    let policy = output_of(&mut policy)?;
    let mut real = Vec::new();
    let mut current = "";
    for line in policy.lines() {
        if let Some(name) = line.strip_suffix(':').filter(|name| !name.starts_with(' ')) {
            current = name;
        } else if line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)") {
            real.push(current.to_owned());
        }
    }
    Ok(real)
}

/// Builds the `ledger` program so that it needs nothing from the guest.
fn build_ledger(repository: &Path) -> Result<PathBuf> {
    let mut build = cargo::command(repository);
    build.args(["build", "--quiet", "--release", "--package", "mainstay-ledger"]);
    build.args(["--target", TARGET]);
    build.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static");
    build.env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    cargo::program_of(&mut build, "ledger")
}

fn find_kernel(root: &Path) -> Result<(PathBuf, String)> {
    for path in sorted_files(&root.join("boot"))? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(version) = name.strip_prefix("vmlinuz-") {
            return Ok((path, version.to_owned()));
        }
    }
    bail!("the kernel package holds no vmlinuz")
}

/// Makes the initramfs.
fn pack(root: &Path, scripts: &Path, ledger: &Path, version: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in
        ["dev", "proc", "sys", "run", "tmp", "var", "etc", "etc/acpi", "etc/acpi/PWRF", "bin", "sbin", "usr"]
    {
        archive.directory(directory);
    }
    for directory in ["usr/bin", "usr/sbin", "lib", "lib/modules", "lib64", "ledger0", "ledger1"] {
        archive.directory(directory);
    }
    // Without it the kernel starts PID 1 with nowhere to write.
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &fs::read(scripts.join("init"))?);
    archive.file("sbin/shutdown", 0o755, &fs::read(scripts.join("shutdown"))?);
    archive.file("etc/acpi/PWRF/00000080", 0o755, &fs::read(scripts.join("power-button"))?);
    archive.file("etc/udhcpc.script", 0o755, &fs::read(scripts.join("udhcpc.script"))?);
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("bin/busybox", 0o755, &fs::read(find_file(root, "busybox")?)?);
    archive.link("bin/sh", "busybox");
    archive.file("usr/bin/ledger", 0o755, &fs::read(ledger)?);
    pack_agent(&mut archive, root)?;
    pack_modules(&mut archive, root, version)?;
    Ok(archive.finish())
}

/// The guest agent with the libraries that its own loader says it needs.
fn pack_agent(archive: &mut Archive, root: &Path) -> Result<()> {
    let agent = find_file(root, "qemu-ga")?;
    let loader = find_file(root, "ld-linux-x86-64.so.2")?;
    let libraries = ["lib", "usr/lib"].map(|directory| root.join(directory).join("x86_64-linux-gnu"));
    let search = libraries.iter().map(|path| path.as_os_str()).collect::<Vec<_>>().join(OsStr::new(":"));
    let mut list = Command::new(&loader);
    list.arg("--library-path").arg(search).arg("--list").arg(&agent);
    for line in output_of(&mut list)?.lines() {
        // `libglib-2.0.so.0 => /path/libglib-2.0.so.0 (0x…)`; the kernel's own page has no path.
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let path = rest.split(" (").next().unwrap_or_default();
        if !path.starts_with('/') {
            bail!("the guest agent needs {name}, which no package brought");
        }
        if !name.contains("ld-linux") {
            archive.file(&format!("lib/{name}"), 0o755, &fs::read(path)?);
        }
    }
    archive.file("lib64/ld-linux-x86-64.so.2", 0o755, &fs::read(&loader)?);
    archive.file("usr/sbin/qemu-ga", 0o755, &fs::read(&agent)?);
    Ok(())
}

/// The modules, and the order in which `init` loads them.
fn pack_modules(archive: &mut Archive, root: &Path, version: &str) -> Result<()> {
    let base = [root.join("lib/modules"), root.join("usr/lib/modules")]
        .into_iter()
        .map(|path| path.join(version))
        .find(|path| path.is_dir())
        .context("the kernel package holds no modules")?;
    let dependencies = module_dependencies(&base)?;
    let built_in = fs::read_to_string(base.join("modules.builtin"))?;
    let mut order = Vec::new();
    for wanted in MODULES {
        match dependencies.keys().find(|path| module_name(path) == wanted) {
            Some(path) => add_with_dependencies(path, &dependencies, &mut order),
            None if built_in.lines().any(|line| module_name(line) == wanted) => {}
            None => bail!("kernel {version} has no module {wanted}"),
        }
    }
    let mut list = String::new();
    for path in order {
        let name = format!("{}.ko", module_name(&path));
        list.push_str(&format!("{name}\n"));
        let path = base.join(path);
        let bytes = match path.extension().and_then(OsStr::to_str) {
            Some("xz") => bytes_of(Command::new("xz").args(["--decompress", "--stdout"]).arg(&path))?,
            Some("zst") => bytes_of(Command::new("zstd").args(["--decompress", "--stdout"]).arg(&path))?,
            _ => fs::read(&path)?,
        };
        archive.file(&format!("lib/modules/{name}"), 0o644, &bytes);
    }
    archive.file("etc/modules.order", 0o644, list.as_bytes());
    Ok(())
}

/// What each module file depends on, as `depmod` finds it.
fn module_dependencies(base: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let root = base.ancestors().nth(3).context("modules lie too high in the tree")?;
    let version = base.file_name().context("modules have no version")?;
    // Not in everybody's path: Debian keeps it where only root looks.
    let depmod = ["/usr/sbin/depmod", "/sbin/depmod"].into_iter().find(|path| Path::new(path).exists());
    output_of(Command::new(depmod.unwrap_or("depmod")).arg("-b").arg(root).arg(version))?;
    let text = fs::read_to_string(base.join("modules.dep"))?;
    let entry = |line: &str| {
        let (path, needs) = line.split_once(':')?;
        Some((path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
    };
    Ok(text.lines().filter_map(entry).collect())
}

/// `modules.dep` lists what must be loaded first last.
fn add_with_dependencies(path: &str, dependencies: &BTreeMap<String, Vec<String>>, order: &mut Vec<String>) {
    let needs = dependencies.get(path).map(Vec::as_slice).unwrap_or_default();
    for path in needs.iter().rev().map(String::as_str).chain([path]) {
        if !order.iter().any(|known| known == path) {
            order.push(path.to_owned());
        }
    }
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The regular file of that name in the unpacked packages.
fn find_file(root: &Path, name: &str) -> Result<PathBuf> {
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file()
                && entry.file_name() == name
                && entry.metadata()?.permissions().mode() & 0o111 != 0
            {
                return Ok(entry.path());
            }
        }
    }
    bail!("the packages hold no program {name}")
}

fn sorted_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.is_file());
    paths.sort();
    Ok(paths)
}

/// Replaces a file in one step: a virtual machine may be reading the old one.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let new_path = path.with_extension("new");
    fs::write(&new_path, bytes)?;
    fs::rename(new_path, path)?;
    Ok(())
}

fn output_of(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes_of(command)?).into_owned())
}

fn bytes_of(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {name}"))?;
    if !output.status.success() {
        bail!("{name} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

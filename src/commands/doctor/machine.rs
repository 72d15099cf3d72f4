//! The machine as Linux describes it, read from files below a root, so that a
//! test can bring its own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What of the machine this process may use. What cannot be read is `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct MachineLimits {
    pub(super) cpu: Cpu,
    pub(super) memory: MemoryLimits,
    /// Whether transparent huge pages are had: "always", "madvise" or "never".
    pub(super) huge_pages: Option<String>,
    /// Files and connections that the process may have open.
    pub(super) open_files_max: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Cpu {
    pub(super) model: Option<String>,
    /// CPUs of the machine.
    pub(super) n_cpus: usize,
    /// Those that the process may run on.
    pub(super) n_allowed: Option<usize>,
    /// How many CPUs' time its control group gets.
    pub(super) quota: Option<f64>,
    /// What the kernel says that they can do.
    pub(super) flags: BTreeSet<String>,
}

/// In bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct MemoryLimits {
    pub(super) total: Option<u64>,
    pub(super) available: Option<u64>,
    /// What its control group may take.
    pub(super) limit: Option<u64>,
}

/// Vector instructions that kernels use, by the kernel's flags; each alternative
/// needs all of its own.
const EXTENSIONS: [(&str, &[&[&str]]); 5] = [
    ("AVX2", &[&["avx2", "fma"]]),
    ("AVX-512", &[&["avx512f", "avx512dq", "avx512bw"]]),
    ("VNNI", &[&["avx512_vnni"], &["avx_vnni"]]),
    ("BF16", &[&["avx512_bf16", "avx512bw"]]),
    ("AMX", &[&["amx_tile", "amx_bf16"]]),
];

impl MachineLimits {
    /// Reads `proc` and `sys` below `root`.
    pub(super) fn read(root: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let groups = Groups::new(root, &read("proc/self/cgroup"));
        let thp = read("sys/kernel/mm/transparent_hugepage/enabled");
        Self {
            cpu: Cpu {
                n_allowed: allowed(&read("proc/self/status")),
                quota: groups.cpu_quota(),
                ..Cpu::parse(&read("proc/cpuinfo"))
            },
            memory: MemoryLimits {
                limit: groups.memory_limit(),
                ..MemoryLimits::parse(&read("proc/meminfo"))
            },
            huge_pages: between(&thp, '[', ']').map(str::to_owned),
            open_files_max: open_files(&read("proc/self/limits")),
        }
    }
}

impl Cpu {
    fn parse(cpuinfo: &str) -> Self {
        let fields = || cpuinfo.lines().filter_map(|line| line.split_once(':'));
        let first = |names: &[&str]| {
            fields()
                .find(|(name, _)| names.contains(&name.trim()))
                .map(|(_, value)| value.trim())
        };
        Self {
            model: first(&["model name"]).map(str::to_owned),
            n_cpus: fields()
                .filter(|(name, _)| name.trim() == "processor")
                .count(),
            flags: first(&["flags", "Features"])
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            ..Self::default()
        }
    }

    /// CPUs whose time the process can have.
    pub(super) fn usable(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "machines have few CPUs")]
        let allowed = self.n_allowed.unwrap_or(self.n_cpus) as f64;
        self.quota.map_or(allowed, |quota| quota.min(allowed))
    }

    /// The extensions of our kernels, those that are there and those that are not.
    pub(super) fn extensions(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        let has = |alternatives: &[&[&str]]| {
            let whole = |flags: &&[&str]| flags.iter().all(|&flag| self.flags.contains(flag));
            alternatives.iter().any(whole)
        };
        let (there, missing): (Vec<_>, Vec<_>) = EXTENSIONS
            .into_iter()
            .partition(|(_, alternatives)| has(alternatives));
        let names = |list: Vec<(&'static str, _)>| list.into_iter().map(|(name, _)| name).collect();
        (names(there), names(missing))
    }
}

impl MemoryLimits {
    fn parse(meminfo: &str) -> Self {
        let bytes = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib = line.trim_start_matches(':').trim().strip_suffix("kB")?;
            Some(kib.trim().parse::<u64>().ok()? * 1024)
        };
        Self {
            total: bytes("MemTotal"),
            available: bytes("MemAvailable"),
            limit: None,
        }
    }

    /// What the process may take of it at most.
    pub(super) fn usable(&self) -> Option<u64> {
        self.total.into_iter().chain(self.limit).min()
    }
}

/// The folders of the control groups that the process is in, innermost first;
/// each may have a limit, and the smallest holds.
struct Groups {
    /// Of the unified hierarchy.
    unified: Vec<PathBuf>,
    /// Of the older ones, where they are used.
    cpu: Vec<PathBuf>,
    memory: Vec<PathBuf>,
}

impl Groups {
    fn new(root: &Path, cgroup: &str) -> Self {
        let mount = root.join("sys/fs/cgroup");
        let folders = |controller: &str| {
            cgroup.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let (controllers, path) = (parts.next()?, parts.next()?);
                let is_it = controllers.split(',').any(|name| name == controller);
                is_it.then(|| upwards(&mount.join(controllers), path))
            })
        };
        Self {
            unified: folders("").unwrap_or_default(),
            cpu: folders("cpu").unwrap_or_default(),
            memory: folders("memory").unwrap_or_default(),
        }
    }

    fn cpu_quota(&self) -> Option<f64> {
        let unified = self.unified.iter().filter_map(|folder| {
            let text = std::fs::read_to_string(folder.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            share(quota.parse().ok()?, period.parse().ok()?)
        });
        let older = self.cpu.iter().filter_map(|folder| {
            let quota = number(&folder.join("cpu.cfs_quota_us"))?;
            share(quota, number(&folder.join("cpu.cfs_period_us"))?)
        });
        unified.chain(older).reduce(f64::min)
    }

    fn memory_limit(&self) -> Option<u64> {
        let limit = |folders: &[PathBuf], file: &str| {
            let limits = folders
                .iter()
                .filter_map(|folder| number(&folder.join(file)));
            limits.min()
        };
        let unified = limit(&self.unified, "memory.max");
        let older = limit(&self.memory, "memory.limit_in_bytes");
        // The older hierarchy writes "none" as the largest number of pages.
        unified
            .into_iter()
            .chain(older)
            .min()
            .filter(|bytes| *bytes < 1 << 60)
    }
}

/// `path` below `mount`, and every folder above it up to `mount`: in a container
/// the path may be the host's, and then only the last is there.
fn upwards(mount: &Path, path: &str) -> Vec<PathBuf> {
    let inner = mount.join(path.trim_start_matches('/'));
    inner
        .ancestors()
        .take_while(|folder| folder.starts_with(mount))
        .map(Path::to_owned)
        .collect()
}

/// A number of CPUs; a quota of -1 is none.
fn share(quota: f64, period: f64) -> Option<f64> {
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

fn number<T: FromStr>(file: &Path) -> Option<T> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// CPUs in a list such as `0-3,8`.
fn allowed(status: &str) -> Option<usize> {
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    list.trim().split(',').try_fold(0, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some(sum + last.checked_sub(first)? + 1)
    })
}

/// The soft limit, which is the one in force.
fn open_files(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        soft => soft.parse().ok(),
    }
}

fn between(text: &str, open: char, close: char) -> Option<&str> {
    text.split_once(open)?
        .1
        .split_once(close)
        .map(|(inner, _)| inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A root with these files.
    fn root(files: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const CPUINFO: &str = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\n\
                           flags\t\t: fpu avx2 fma avx512f avx512dq avx512bw avx_vnni amx_tile\n\n\
                           processor\t: 1\nmodel name\t: Intel(R) Xeon(R) Platinum 8481C\n\
                           flags\t\t: fpu avx2 fma\n";

    #[test]
    fn cpus_and_what_they_can_do() {
        let machine = MachineLimits::read(
            root(&[
                ("proc/cpuinfo", CPUINFO),
                ("proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-3,8\n"),
            ])
            .path(),
        );
        let cpu = &machine.cpu;
        assert_eq!(
            cpu.model.as_deref(),
            Some("Intel(R) Xeon(R) Platinum 8481C")
        );
        assert_eq!((cpu.n_cpus, cpu.n_allowed), (2, Some(5)));
        assert_eq!(
            cpu.extensions(),
            (vec!["AVX2", "AVX-512", "VNNI"], vec!["BF16", "AMX"]),
            "AMX needs its products in bfloat16 too"
        );
    }

    #[test]
    fn arm_has_features_and_no_model_name() {
        let cpu = Cpu::parse("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n");
        assert_eq!((cpu.model.as_deref(), cpu.n_cpus), (None, 1));
        assert!(cpu.flags.contains("asimd"));
        assert_eq!(cpu.extensions().0, Vec::<&str>::new());
    }

    #[test]
    fn the_smallest_limit_of_all_groups_around_holds() {
        let limits = |files: &[(&str, &str)]| {
            let machine = MachineLimits::read(root(files).path());
            (machine.cpu.quota, machine.memory.limit)
        };
        let pod = [
            ("proc/self/cgroup", "0::/pods/a/worker\n"),
            ("sys/fs/cgroup/pods/a/worker/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/pods/a/worker/memory.max", "max\n"),
            ("sys/fs/cgroup/pods/a/cpu.max", "250000 100000\n"),
            ("sys/fs/cgroup/pods/cpu.max", "800000 100000\n"),
            ("sys/fs/cgroup/pods/memory.max", "2147483648\n"),
        ];
        assert_eq!(limits(&pod), (Some(2.5), Some(2 << 30)));
        // A container that sees its own group as the root.
        let inside = [
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/cpu.max", "50000 100000\n"),
        ];
        assert_eq!(limits(&inside), (Some(0.5), None));
        // The older hierarchies, under a path that only the host has.
        let older = [
            (
                "proc/self/cgroup",
                "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            ),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"),
        ];
        assert_eq!(limits(&older), (Some(1.5), Some(1 << 30)));
        let unlimited = [
            ("proc/self/cgroup", "5:memory:/\n3:cpu:/\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ];
        assert_eq!(limits(&unlimited), (None, None));
    }

    #[test]
    fn what_a_process_can_use_is_the_least_of_what_it_is_given() {
        let cpu = |n_allowed, quota| {
            let cpu = Cpu {
                n_cpus: 64,
                n_allowed,
                quota,
                ..Cpu::default()
            };
            cpu.usable().to_string()
        };
        assert_eq!(cpu(None, None), "64");
        assert_eq!(cpu(Some(4), None), "4");
        assert_eq!(cpu(Some(4), Some(1.5)), "1.5");
        assert_eq!(cpu(Some(4), Some(6.0)), "4");
    }

    #[test]
    fn memory_pages_and_files() {
        let machine = MachineLimits::read(
            root(&[
                (
                    "proc/meminfo",
                    "MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n",
                ),
                (
                    "sys/kernel/mm/transparent_hugepage/enabled",
                    "always [madvise] never\n",
                ),
                (
                    "proc/self/limits",
                    "Limit  Soft Limit  Hard Limit  Units\n\
                     Max open files            1024                 524288               files\n",
                ),
            ])
            .path(),
        );
        assert_eq!(machine.memory.total, Some(2 << 20));
        assert_eq!(machine.memory.available, Some(1 << 20));
        assert_eq!(machine.memory.usable(), Some(2 << 20));
        assert_eq!(machine.huge_pages.as_deref(), Some("madvise"));
        assert_eq!(machine.open_files_max, Some(1024));
    }

    #[test]
    fn what_is_not_there_is_not_made_up() {
        assert_eq!(
            MachineLimits::read(root(&[]).path()),
            MachineLimits::default()
        );
    }
}

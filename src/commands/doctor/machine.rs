//! Limits of the machine as Linux describes them, read from files below a root,
//! so that a test can provide its own root.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use procfs::process::Status;
use procfs::{CpuInfo, FromRead, Meminfo, ProcessCGroups};
use rustix::process::{Resource, getrlimit};

/// Resources of the machine that this process may use. An unreadable value is
/// `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct MachineLimits {
    pub(super) cpu: Cpu,
    pub(super) memory: MemoryLimits,
    /// Mode of transparent huge pages: "always", "madvise" or "never".
    pub(super) huge_pages: Option<String>,
    /// Limit on open files and connections of the process.
    pub(super) open_files_max: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Cpu {
    pub(super) model: Option<String>,
    /// Number of CPUs of the machine.
    pub(super) n_cpus: usize,
    /// Number of CPUs that the process may run on.
    pub(super) n_allowed: Option<usize>,
    /// CPU quota of the process's cgroup, in CPUs.
    pub(super) quota: Option<f64>,
    /// CPU features, as the kernel names them.
    pub(super) flags: BTreeSet<String>,
}

/// Memory sizes in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct MemoryLimits {
    pub(super) total: Option<u64>,
    pub(super) available: Option<u64>,
    /// Memory limit of the process's cgroup.
    pub(super) limit: Option<u64>,
}

/// Vector extensions that the kernels use, with the CPU flags of each: an
/// extension is present if all flags of one alternative are.
const EXTENSIONS: [(&str, &[&[&str]]); 5] = [
    ("AVX2", &[&["avx2", "fma"]]),
    ("AVX-512", &[&["avx512f", "avx512dq", "avx512bw"]]),
    ("VNNI", &[&["avx512_vnni"], &["avx_vnni"]]),
    ("BF16", &[&["avx512_bf16", "avx512bw"]]),
    ("AMX", &[&["amx_tile", "amx_bf16"]]),
];

impl MachineLimits {
    /// Reads the limits of this machine, and the soft limit on open files of
    /// this process.
    pub(super) fn here() -> Self {
        Self {
            open_files_max: Some(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)),
            ..Self::read(Path::new("/"))
        }
    }

    /// Reads the files below `root/proc` and `root/sys`.
    fn read(root: &Path) -> Self {
        let groups = Groups::new(root);
        let thp = root.join("sys/kernel/mm/transparent_hugepage/enabled");
        let thp = std::fs::read_to_string(thp).unwrap_or_default();
        let cpu = parsed(root, "proc/cpuinfo").map(|info: CpuInfo| Cpu::new(&info));
        let memory = parsed(root, "proc/meminfo").map(|info: Meminfo| MemoryLimits::new(&info));
        Self {
            cpu: Cpu {
                n_allowed: parsed(root, "proc/self/status").and_then(|status| allowed(&status)),
                quota: groups.cpu_quota(),
                ..cpu.unwrap_or_default()
            },
            memory: MemoryLimits {
                limit: groups.memory_limit(),
                ..memory.unwrap_or_default()
            },
            huge_pages: between(&thp, '[', ']').map(str::to_owned),
            open_files_max: None,
        }
    }
}

impl Cpu {
    /// Reads the features of the first CPU, which stands for all CPUs.
    fn new(info: &CpuInfo) -> Self {
        let mut names = ["flags", "Features"].into_iter();
        let flags = names.find_map(|name| info.get_field(0, name));
        Self {
            model: info.model_name(0).map(str::to_owned),
            n_cpus: info.num_cores(),
            flags: flags
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            ..Self::default()
        }
    }

    /// Number of CPUs whose time the process can use.
    pub(super) fn usable(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "machines have few CPUs")]
        let allowed = self.n_allowed.unwrap_or(self.n_cpus) as f64;
        self.quota.map_or(allowed, |quota| quota.min(allowed))
    }

    /// Vector extensions of the kernels: first the present ones, then the
    /// missing ones.
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
    fn new(info: &Meminfo) -> Self {
        Self {
            total: Some(info.mem_total),
            available: info.mem_available,
            limit: None,
        }
    }

    /// Memory that the process may use at most, in bytes.
    pub(super) fn usable(&self) -> Option<u64> {
        self.total.into_iter().chain(self.limit).min()
    }
}

/// Directories of the process's cgroups, innermost first. Each may have a
/// limit; the smallest limit applies.
struct Groups {
    /// Directories in the unified hierarchy (cgroup v2).
    unified: Vec<PathBuf>,
    /// Directories in the older hierarchies (cgroup v1), where they are used.
    cpu: Vec<PathBuf>,
    memory: Vec<PathBuf>,
}

impl Groups {
    fn new(root: &Path) -> Self {
        let mount = root.join("sys/fs/cgroup");
        let groups = parsed(root, "proc/self/cgroup").map_or(Vec::new(), |ProcessCGroups(all)| all);
        let folders = |is_it: fn(&[String]) -> bool| {
            let group = groups.iter().find(|group| is_it(&group.controllers));
            group.map_or(Vec::new(), |group| {
                upwards(&mount.join(group.controllers.join(",")), &group.pathname)
            })
        };
        Self {
            unified: folders(<[String]>::is_empty),
            cpu: folders(|names| names.iter().any(|name| name == "cpu")),
            memory: folders(|names| names.iter().any(|name| name == "memory")),
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
        // A cgroup v1 without a limit reports the largest number of pages.
        unified
            .into_iter()
            .chain(older)
            .min()
            .filter(|bytes| *bytes < 1 << 60)
    }
}

/// Returns `path` below `mount`, and every directory above it up to `mount`. In
/// a container, the path may be the host's, and then only `mount` exists.
fn upwards(mount: &Path, path: &str) -> Vec<PathBuf> {
    let inner = mount.join(path.trim_start_matches('/'));
    inner
        .ancestors()
        .take_while(|folder| folder.starts_with(mount))
        .map(Path::to_owned)
        .collect()
}

/// Returns a quota as a number of CPUs; a quota of -1 means no limit.
fn share(quota: f64, period: f64) -> Option<f64> {
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

fn number<T: FromStr>(file: &Path) -> Option<T> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Parses a file of /proc; `None` if the file does not exist or cannot be
/// parsed.
fn parsed<T: FromRead>(root: &Path, path: &str) -> Option<T> {
    T::from_file(root.join(path)).ok()
}

/// Counts the CPUs in the ranges that the process may run on.
fn allowed(status: &Status) -> Option<usize> {
    let mut ranges = status.cpus_allowed_list.as_ref()?.iter();
    ranges.try_fold(0, |sum, (first, last)| {
        Some(sum + usize::try_from(last.checked_sub(*first)?).ok()? + 1)
    })
}

fn between(text: &str, open: char, close: char) -> Option<&str> {
    text.split_once(open)?
        .1
        .split_once(close)
        .map(|(inner, _)| inner)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// Makes a root directory with these files.
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

    /// The fields that every kernel writes, and the field that is read.
    const STATUS: &str = "Name:\tx\nState:\tR (running)\nTgid:\t7\nPid:\t7\nPPid:\t1\n\
                          TracerPid:\t0\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nFDSize:\t64\n\
                          Groups:\t\nThreads:\t1\nSigQ:\t0/7\nSigPnd:\t0\nShdPnd:\t0\n\
                          SigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\nCapInh:\t0\nCapPrm:\t0\n\
                          CapEff:\t0\nCpus_allowed_list:\t0-3,8\n";

    const MEMINFO: &str = "MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n\
                           Buffers: 0 kB\nCached: 0 kB\nSwapCached: 0 kB\nActive: 0 kB\n\
                           Inactive: 0 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\nDirty: 0 kB\n\
                           Writeback: 0 kB\nMapped: 0 kB\nSlab: 0 kB\nCommitted_AS: 0 kB\n\
                           VmallocTotal: 0 kB\nVmallocUsed: 0 kB\nVmallocChunk: 0 kB\n";

    #[test]
    fn cpus_and_what_they_can_do() {
        let machine = MachineLimits::read(
            root(&[("proc/cpuinfo", CPUINFO), ("proc/self/status", STATUS)]).path(),
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
        let text = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n";
        let cpu = Cpu::new(&CpuInfo::from_read(text.as_bytes()).unwrap());
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
        // A container that sees its own cgroup as the root.
        let inside = [
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/cpu.max", "50000 100000\n"),
        ];
        assert_eq!(limits(&inside), (Some(0.5), None));
        // Older hierarchies, under a path that only the host has.
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
    fn memory_and_pages() {
        let machine = MachineLimits::read(
            root(&[
                ("proc/meminfo", MEMINFO),
                (
                    "sys/kernel/mm/transparent_hugepage/enabled",
                    "always [madvise] never\n",
                ),
            ])
            .path(),
        );
        assert_eq!(machine.memory.total, Some(2 << 20));
        assert_eq!(machine.memory.available, Some(1 << 20));
        assert_eq!(machine.memory.usable(), Some(2 << 20));
        assert_eq!(machine.huge_pages.as_deref(), Some("madvise"));
    }

    #[test]
    fn this_machine_is_known() {
        let machine = MachineLimits::here();
        assert!(machine.cpu.n_cpus > 0 && machine.cpu.n_allowed.is_some());
        assert!(machine.memory.total > machine.memory.available);
        // The shell reports the same limit.
        let shell = std::process::Command::new("sh")
            .args(["-c", "ulimit -n"])
            .output()
            .unwrap();
        let said = String::from_utf8(shell.stdout).unwrap();
        let limit = said.trim().parse().unwrap_or(u64::MAX);
        assert_eq!(machine.open_files_max, Some(limit));
    }

    #[test]
    fn what_is_not_there_is_not_made_up() {
        assert_eq!(
            MachineLimits::read(root(&[]).path()),
            MachineLimits::default()
        );
    }
}

//! Metrics of the GPUs that the model runs on. Only a worker that uses CUDA has
//! these metrics: zero bytes for a GPU that does not exist would be wrong.

use super::Metrics;
use super::registry::{LateMetric, Registry};
use crate::gpu::GpuUsage;

/// Definitions of the metrics of GPUs.
pub(super) struct GpuMetrics {
    memory_used: LateMetric,
    memory_total: LateMetric,
    utilization: LateMetric,
}

impl GpuMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            memory_used: metrics.device_gauge(
                "imagegpt_gpu_memory_used_bytes",
                "GPU memory in use by all processes, in bytes, by device.",
            ),
            memory_total: metrics.device_gauge(
                "imagegpt_gpu_memory_total_bytes",
                "Total GPU memory in bytes, by device.",
            ),
            utilization: metrics.device_gauge(
                "imagegpt_gpu_utilization_ratio",
                "Share of the last sampling period in which the GPU was computing, from 0 to 1, \
                 by device.",
            ),
        }
    }
}

impl Metrics {
    /// Sets the current usage of the GPU with this number in --device-id;
    /// values that the GPU does not report get no series.
    pub fn gpu(&self, id: i32, usage: GpuUsage) {
        let (id, gpu) = (id.to_string(), &self.handles().gpu);
        let set = |metric: &LateMetric, value: Option<f64>| {
            if let Some(value) = value {
                metric.gauge(&self.0.recorder, &[&id]).set(value);
            }
        };
        let memory = usage.memory;
        set(
            &gpu.memory_used,
            memory.map(|memory| bytes(memory.used_bytes)),
        );
        set(
            &gpu.memory_total,
            memory.map(|memory| bytes(memory.total_bytes)),
        );
        set(&gpu.utilization, usage.utilization);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "memory of a GPU stays far below 2^52 bytes"
)]
fn bytes(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::MemoryUse;

    #[test]
    fn series_appear_with_their_first_value() {
        let metrics = Metrics::new().unwrap();
        assert!(!metrics.render().contains("imagegpt_gpu"));
        let memory = Some(MemoryUse {
            used_bytes: 5,
            total_bytes: 80,
        });
        let whole = GpuUsage {
            memory,
            utilization: Some(0.5),
            power_watts: None,
        };
        metrics.gpu(0, whole);
        // A part of a GPU has no utilization.
        let part = GpuUsage {
            memory,
            ..GpuUsage::default()
        };
        metrics.gpu(3, part);
        let page = metrics.render();
        for line in [
            "imagegpt_gpu_memory_used_bytes{device=\"0\"} 5",
            "imagegpt_gpu_memory_total_bytes{device=\"3\"} 80",
            "imagegpt_gpu_utilization_ratio{device=\"0\"} 0.5",
        ] {
            assert!(page.lines().any(|seen| seen == line), "{line}: {page}");
        }
        assert!(!page.contains("imagegpt_gpu_utilization_ratio{device=\"3\"}"));
    }
}

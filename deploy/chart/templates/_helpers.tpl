{{- define "imagegpt.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 52 characters, because the longest suffix, -dashboard, has 10, and a Service's
name may have 63 and no dots. */}}
{{- define "imagegpt.fullname" -}}
{{- $name := include "imagegpt.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $name = .Release.Name -}}
{{- else -}}
{{- $name = printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- $name | replace "." "-" | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "imagegpt.worker" -}}
{{- printf "%s-worker" (include "imagegpt.fullname" .) -}}
{{- end -}}

{{- define "imagegpt.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride -}}
{{- end -}}

{{/* Labels of the worker's pods and of what selects them. */}}
{{- define "imagegpt.selector" -}}
app.kubernetes.io/name: {{ include "imagegpt.name" . }}
app.kubernetes.io/component: worker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The metadata of an object: a list of the context, the name and, if wanted,
further labels and annotations. */}}
{{- define "imagegpt.metadata" -}}
{{- $root := index . 0 -}}
{{- $labels := dict
  "app.kubernetes.io/part-of" "imagegpt"
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/managed-by" $root.Release.Service
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63) -}}
{{- if gt (len .) 2 -}}{{- $labels = merge $labels (index . 2) -}}{{- end -}}
{{- $annotations := dict -}}
{{- if gt (len .) 3 -}}{{- $annotations = merge $annotations (index . 3) -}}{{- end -}}
{{- $annotations = merge $annotations $root.Values.commonAnnotations -}}
name: {{ index . 1 }}
namespace: {{ include "imagegpt.namespace" $root }}
labels:
  {{- merge $labels $root.Values.commonLabels | toYaml | nindent 2 }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "imagegpt.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "imagegpt.worker" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "imagegpt.claim" -}}
{{- default (printf "%s-models" (include "imagegpt.fullname" .)) .Values.model.volume.existingClaim -}}
{{- end -}}

{{- define "imagegpt.image" -}}
{{- $image := .Values.image -}}
{{- $repository := default (ternary "imagegpt-worker-cuda" "imagegpt-worker" .Values.gpu.enabled) $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The worker's variables as YAML: those of Kustomize's base and components
(files/settings.yaml), then what the values imply, then `settings`. */}}
{{- define "imagegpt.settings" -}}
{{- $parts := .Files.Get "files/settings.yaml" | fromYaml -}}
{{- $model := .Values.model -}}
{{- $found := merge (dict) (index $parts (ternary "gpu" "cpu" .Values.gpu.enabled)) $parts.base -}}
{{- if eq $model.source "image" -}}
{{- $_ := set $found "IMAGEGPT_MODEL" $model.image.path -}}
{{- else if eq $model.source "hub" -}}
{{- $found = merge (dict "IMAGEGPT_MODEL" $model.hub.repository "IMAGEGPT_REVISION" $model.hub.revision)
  (index $parts "model-from-hub") $found -}}
{{- else -}}
{{- $found = merge (dict "IMAGEGPT_MODEL" $model.volume.path) (index $parts "model-from-pvc") $found -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $found = merge (dict) $parts.mtls $found -}}
{{- if not .Values.tls.clientAuth -}}{{- $_ := unset $found "IMAGEGPT_TLS_CLIENT_CA" -}}{{- end -}}
{{- end -}}
{{- if .Values.auth.enabled -}}
{{- $_ := set $found "IMAGEGPT_INSECURE" "false" -}}
{{- $_ := set $found "IMAGEGPT_AUTH_TOKENS_FILE" (printf "/auth/%s" .Values.auth.key) -}}
{{- end -}}
{{- range $name, $value := .Values.settings -}}
{{/* As JSON, a number keeps its digits. */}}
{{- $_ := set $found $name (kindIs "string" $value | ternary $value (toJson $value)) -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* The name of the ConfigMap ends in a hash of its contents, as Kustomize's does,
so that a changed setting is rolled out, and rolled back, with its pods. */}}
{{- define "imagegpt.configName" -}}
{{- $data := include "imagegpt.settings" . | fromYaml -}}
{{- $hash := dict "kind" "ConfigMap" "name" "" "data" $data | toJson | sha256sum | trunc 10 -}}
{{- $hash = $hash | replace "0" "g" | replace "1" "h" | replace "3" "k" | replace "a" "m" | replace "e" "t" -}}
{{- printf "%s-%s" (include "imagegpt.worker" .) $hash -}}
{{- end -}}

{{/* A time such as 10s or 1m, in seconds. */}}
{{- define "imagegpt.seconds" -}}
{{- $name := index . 0 -}}
{{- $text := index . 1 -}}
{{- if not (regexMatch "^[0-9]+(s|m|h)$" $text) -}}
{{- fail (printf "settings.%s is %q; write one number with s, m or h, or set terminationGracePeriodSeconds" $name $text) -}}
{{- end -}}
{{- $unit := regexFind "[smh]$" $text -}}
{{- mul (regexFind "^[0-9]+" $text | int) (get (dict "s" 1 "m" 60 "h" 3600) $unit) -}}
{{- end -}}

{{- define "imagegpt.terminationGracePeriodSeconds" -}}
{{- if .Values.terminationGracePeriodSeconds -}}
{{- int .Values.terminationGracePeriodSeconds -}}
{{- else -}}
{{- $settings := include "imagegpt.settings" . | fromYaml -}}
{{- $sum := 5 -}}
{{- range $name := list "IMAGEGPT_SHUTDOWN_DELAY" "IMAGEGPT_SHUTDOWN_GRACE_PERIOD" -}}
{{- $sum = add $sum (include "imagegpt.seconds" (list $name (get $settings $name)) | int) -}}
{{- end -}}
{{- $sum -}}
{{- end -}}
{{- end -}}

{{- define "imagegpt.startupSeconds" -}}
{{- if .Values.startupSeconds -}}
{{- int .Values.startupSeconds -}}
{{- else -}}
{{- eq .Values.model.source "hub" | ternary 1200 300 -}}
{{- end -}}
{{- end -}}

{{- define "imagegpt.resources" -}}
{{- $requests := dict "cpu" "2" "memory" "3Gi" -}}
{{- $limits := dict "memory" "3Gi" -}}
{{- if .Values.gpu.enabled -}}
{{- $requests = dict "cpu" "4" "memory" "8Gi" -}}
{{- $limits = dict "memory" "8Gi" .Values.gpu.resourceName (int .Values.gpu.count) -}}
{{- end -}}
{{- if eq .Values.model.source "hub" -}}
{{- $_ := set $requests "ephemeral-storage" .Values.model.hub.cacheRequest -}}
{{- $_ := set $limits "ephemeral-storage" .Values.model.hub.cacheLimit -}}
{{- end -}}
{{- mergeOverwrite (dict "requests" $requests "limits" $limits) .Values.resources | toYaml -}}
{{- end -}}

{{/* A probe's handler: a list of the context, the health service and the path.
The kubelet's gRPC probe speaks no TLS, so with TLS the metrics port answers. */}}
{{- define "imagegpt.probe" -}}
{{- if (index . 0).Values.tls.enabled -}}
httpGet:
  path: {{ index . 2 }}
  port: metrics
{{- else -}}
grpc:
  port: 50051
  service: {{ index . 1 }}
{{- end -}}
{{- end -}}

{{/* What autoscalers have in common. */}}
{{- define "imagegpt.scaling" -}}
{{- $scaling := .Values.autoscaling -}}
{{- if lt (int $scaling.maxReplicas) (int $scaling.minReplicas) -}}
{{- fail (printf "autoscaling.maxReplicas is %v, below autoscaling.minReplicas, %v" $scaling.maxReplicas $scaling.minReplicas) -}}
{{- end -}}
{{- end -}}

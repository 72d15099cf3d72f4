{{/* The pod's volumes and where the container mounts them, as YAML lists. */}}
{{- define "imagegpt.volumes" -}}
{{- if .Values.gpu.enabled }}
- name: cuda-cache
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
{{- if eq .Values.model.source "hub" }}
- name: cache
  emptyDir:
    sizeLimit: {{ .Values.model.hub.cacheLimit }}
{{- else if eq .Values.model.source "volume" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "imagegpt.claim" . }}
    readOnly: true
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ .Values.tls.secretName }}
    # 0440: only the owner and the pod's group (fsGroup) can read it.
    defaultMode: 288
{{- end }}
{{- if .Values.auth.enabled }}
- name: auth
  secret:
    secretName: {{ .Values.auth.secretName }}
    defaultMode: 288
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Secrets are mounted without subPath, because a renewed one would never arrive
through it. */}}
{{- define "imagegpt.mounts" -}}
{{- if .Values.gpu.enabled }}
- name: cuda-cache
  mountPath: /cuda-cache
{{- end }}
{{- if eq .Values.model.source "hub" }}
- name: cache
  mountPath: /cache
{{- else if eq .Values.model.source "volume" }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /tls
  readOnly: true
{{- end }}
{{- if .Values.auth.enabled }}
- name: auth
  mountPath: /auth
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
A pod of the Ray cluster. root: the top scope; name: of its container; size: cpu, memory, accelerator, nodeSelector and
tolerations; head: whether it has the gateway.
*/}}
{{- define "slipstream.pod" -}}
{{- $values := .root.Values -}}
spec:
  terminationGracePeriodSeconds: {{ add 10 (ceil $values.config.gateway.drain_timeout_s) }}
  containers:
    - name: {{ .name }}
      image: {{ printf "%s:%s" $values.image.repository $values.image.tag | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- if .head }}
      ports:
        - {name: gcs, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: serve, containerPort: 8000}
        - {name: http, containerPort: {{ $values.config.gateway.port }}}
      {{- end }}
      env:
        - name: SLIPSTREAM_CACHE
          value: {{ $values.modelCache.mountPath | quote }}
      resources:
        {{- range list "requests" "limits" }}
        {{ . }}:
          cpu: {{ $.size.cpu | quote }}
          memory: {{ $.size.memory | quote }}
          {{- with $.size.accelerator }}
          {{ .resource }}: {{ .count }}
          {{- end }}
        {{- end }}
      volumeMounts:
        - name: cache
          mountPath: {{ $values.modelCache.mountPath | quote }}
  volumes:
    - name: cache
      {{- if $values.modelCache.existingClaim }}
      persistentVolumeClaim:
        claimName: {{ $values.modelCache.existingClaim | quote }}
      {{- else }}
      emptyDir: {}
      {{- end }}
  {{- with .size.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .size.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

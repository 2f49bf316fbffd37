-- Put in front of the scripts that must know all lists. While the index may be incomplete (see LISTS in keys.py) nothing
-- is deleted: the ids are noted and judged again once it is complete.
local function destinations()
  local names, seen, whole = {}, {}, false
  for _, index in ipairs({redis.call('SMEMBERS', 'smtpdup:lists'), redis.call('HKEYS', 'smtpdup:destinations')}) do
    for _, name in ipairs(index) do
      if name == '' then
        whole = true
      elseif not seen[name] then
        seen[name] = true
        names[#names + 1] = name
      end
    end
  end
  return names, whole
end

local function is_listed(names, id)
  for _, name in ipairs(names) do
    if redis.call('ZSCORE', 'smtpdup:pending:' .. name, id) or redis.call('ZSCORE', 'smtpdup:failed:' .. name, id) then
      return true
    end
  end
  return false
end

local function forget_body(id, whole)
  if whole then return redis.call('DEL', 'smtpdup:message:' .. id) end
  redis.call('SADD', 'smtpdup:kept', id)
  return 0
end
